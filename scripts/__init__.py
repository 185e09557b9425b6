"""SFT-Play: one script a step of fine-tuning a language model."""
