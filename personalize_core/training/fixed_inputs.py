"""The loss that a stage trains on, on inputs that stay the same, so that its fall can be seen.

A training log cannot tell: its images, noise and timesteps change with every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods.interface import Method, Stage
from personalize_core.randomness import generator_for, seed_for
from personalize_core.training.loop import noised, predicted, row_losses

ROWS = 8  # of the concept; a method with prior preservation has as many of the class noun


@torch.no_grad()
def losses_on_fixed_inputs(method: Method, base: BaseModel, images: ConceptLatents, stage: Stage, seed: int) -> Tensor:
    """(rows,), which add up to what the stage minimizes but for penalties, by a method in training that is attached.

    Timesteps lie evenly in those that the stage trains on. What a method draws at random, such as dropout, is the
    same each time. Memory: no more rows at once than in a step.
    """
    generator = generator_for(seed, stage.name, "fixed inputs")
    torch.manual_seed(seed_for(seed, stage.name, "fixed inputs", "modules"))
    batch = method.batch(images, ROWS, generator)
    last, count = base.scheduler.config.num_train_timesteps, len(batch.prompts)
    place = torch.arange(count) % ROWS  # each timestep for both kinds of rows
    t = stage.min_timestep + (last - stage.min_timestep) * (2 * place + 1) // (2 * ROWS)
    noise = torch.randn(batch.latents.shape, generator=generator)
    rows = noised(base, batch, noise, t, generator)
    context = method.condition(base, batch.prompts)(rows.t)
    parts = [slice(start, start + stage.batch_size) for start in range(0, count, stage.batch_size)]
    of_rows = stage.objective or row_losses
    return torch.cat([of_rows(predicted(stage, base, rows, context, part)) for part in parts]).cpu()
