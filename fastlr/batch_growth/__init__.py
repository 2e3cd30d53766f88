"""Growing the batch in place of decaying the learning rate: plans, and loaders that follow them.

Smith, Kindermans, Ying and Le, arXiv 1711.00489.
"""

from fastlr.batch_growth.adaptive import AdaptiveGrowth, Growth
from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.loader import Epoch, GrowingLoader
from fastlr.batch_growth.noise_scale import GradientNoiseScale
from fastlr.batch_growth.phase import Phase
from fastlr.batch_growth.plan import BatchPlan
from fastlr.batch_growth.sampler import GrowingBatchSampler

__all__ = [
    "AdaptiveGrowth",
    "Batch",
    "BatchPlan",
    "Epoch",
    "GradientNoiseScale",
    "GrowingBatchSampler",
    "GrowingLoader",
    "Growth",
    "Phase",
]
