"""TorchTitan 0.3's learning rate, which stays where its schedule ends."""

from dataclasses import dataclass

from torchtitan.components.optimizer import LRSchedulersContainer

from ..lr_scheduler import hold_last_rate

__all__ = ["LRSchedulers"]


class LRSchedulers(LRSchedulersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        def build(self, *, optimizers, training_steps):
            built = LRSchedulersContainer.Config.build(self, optimizers=optimizers, training_steps=training_steps)
            hold_last_rate(built.schedulers, self.total_steps or training_steps)
            return built
