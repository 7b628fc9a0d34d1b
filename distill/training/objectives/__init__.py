"""What fine-tuning may be for, one file an idea, on the base in distill/training/objective.py."""
