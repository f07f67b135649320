"""The paper's tables with a row of one's own: ``python -m gdn2_titan.evaluate --model FOLDER --tasks paper``."""
