"""One PEFT adapter folder, read strictly and without torch: its config, its tensors, and whether it fits a bundle."""
