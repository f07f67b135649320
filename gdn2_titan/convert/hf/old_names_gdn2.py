"""Hugging Face folders that name parameters as this package once did, loaded by ``from_pretrained``."""

import re

from gdn2_titan.models.old_names import OLD_NAMES

__all__ = ["ReadsOldNames"]

# transformers' own table would do this by the kind of the model, also for the code that lies beside an old folder's
# weights and wants the old names.
_KEY_MAPPING = {re.escape(f"mixer.{old}"): f"mixer.{new}" for old, new in OLD_NAMES.items()}


class ReadsOldNames:
    """In front of PreTrainedModel: loads old names and today's, saves today's."""

    @classmethod
    def from_pretrained(cls, *args, key_mapping=None, **kwargs):
        loaded = super().from_pretrained(*args, key_mapping={**(key_mapping or {}), **_KEY_MAPPING}, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what was missing
        # transformers renames back when it saves a model.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in used if each.source_patterns[0] not in _KEY_MAPPING]
        return loaded
