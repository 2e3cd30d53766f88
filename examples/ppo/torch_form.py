"""PPO on a toy, its update captured in a CUDA graph; the rate falls to 0 from iteration to iteration.

The agent pushes carts left or right, and is to keep them near the origin.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.distributions import Categorical


class Carts:
    def __init__(self, count: int, device: str) -> None:
        self.state = torch.randn(count, 2, device=device)  # where they are, and how fast

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        where, speed = self.state.unbind(1)
        speed = 0.95 * speed + 0.1 * (2.0 * action - 1.0)
        self.state = torch.stack((where + 0.2 * speed, speed), 1).clamp(-3.0, 3.0)
        return self.state, -self.state[:, 0].square()


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, state: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        # Checking the logits would have the host wait, which no graph can capture.
        return Categorical(logits=self.actor(state), validate_args=False), self.critic(state).squeeze(-1)


class Captured:
    """Runs twice as it is, then into a CUDA graph, which it replays from there on; on a CPU as it is."""

    def __init__(self, run: Callable[..., torch.Tensor]) -> None:
        self.run, self.calls = run, 0

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not inputs[0].is_cuda:
            return self.run(*inputs)
        if self.calls == 0:
            self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            self.inputs = [x.clone() for x in inputs]
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.calls += 1
        if self.calls <= 2:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.output = self.run(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.output
        if self.calls == 3:
            with torch.cuda.graph(self.graph):
                self.output = self.run(*self.inputs)
        self.graph.replay()
        return self.output


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--carts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="of each cart, an iteration")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gamma", type=float, default=0.97)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--max-grad-norm", type=float, default=0.5)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device, size = args.device, args.carts * args.steps
    carts, agent = Carts(args.carts, device), Agent().to(device)
    # The graph reads the rate where it lies, so it has to be a tensor, and to stay that tensor.
    rate = torch.tensor(args.lr, device=device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, capturable=device == "cuda")

    @Captured
    def update(states, actions, before, advantages, returns):
        policy, values = agent(states)
        ratio = (policy.log_prob(actions) - before).exp()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss = 0.5 * (values - returns).square().mean() - gain - 0.01 * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        return loss.detach()

    state = carts.state
    for iteration in range(args.iterations):
        optimizer.param_groups[0]["lr"].fill_(args.lr * (1 - iteration / args.iterations))
        kept = []
        with torch.no_grad():
            for _ in range(args.steps):
                policy, value = agent(state)
                action = policy.sample()
                after, reward = carts.step(action)
                kept.append((state, action, policy.log_prob(action), value, reward))
                state = after
            states, actions, before, values, rewards = (
                torch.stack(column) for column in zip(*kept, strict=True)
            )
            advantages, advantage, following = torch.zeros_like(rewards), 0.0, agent(state)[1]
            for t in reversed(range(args.steps)):
                surprise = rewards[t] + args.gamma * following - values[t]
                advantage = surprise + args.gamma * args.gae_lambda * advantage
                advantages[t], following = advantage, values[t]
        rollout = [x.flatten(0, 1) for x in (states, actions, before, advantages, advantages + values)]
        for _ in range(args.epochs):
            for places in torch.randperm(size, device=device).chunk(args.minibatches):
                loss = update(*(x[places] for x in rollout))
        if iteration % 5 == 4:
            print(f"iteration {iteration}: reward {rewards.mean():.3f}, loss {loss:.3f}")
    return {"weights": agent.state_dict(), "reward": rewards.mean().item()}


if __name__ == "__main__":
    main()
