"""What a training may be made of: where it starts from, and what is added to its steps."""
