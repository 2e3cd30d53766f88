"""
Schedules
=========

A schedule is a value: it is called, joined, scaled and drawn without an optimizer.
"""

import fastlr
from fastlr.plotting import plot_schedules

cyclic = {
    "triangular": fastlr.Triangular(0.001, 0.006, step_size_up=1000),
    "triangular2": fastlr.Triangular2(0.001, 0.006, step_size_up=1000),
    "exp_range": fastlr.ExpRange(0.001, 0.006, step_size_up=1000, gamma=0.9998),
}
figure = plot_schedules(cyclic, steps=8000)

# %%
# Recipes that begin with a warm-up:
recipes = {
    "cosine": fastlr.cosine_with_warmup(0.006, warmup_steps=800, total_steps=8000),
    "warmup-stable-decay": fastlr.warmup_stable_decay(0.006, 800, 5600, 1600),
    "Noam, scaled": fastlr.noam(512, 800) * 1.5,
}
figure = plot_schedules(recipes, steps=8000)

# %%
# Any two are joined by ``then``, and a formula of one's own is a table.
warmup = fastlr.LinearRamp(0.0, 0.006, 500)
mine = fastlr.Tabulated(lambda t: 0.006 / (1 + t / 1000) ** 0.5, steps=7500)
schedule = warmup.then(mine)
figure = schedule.plot()
print([round(schedule(t), 5) for t in (0, 250, 500, 7999)])
