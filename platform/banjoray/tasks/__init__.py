"""What a task means, end to end: one file each."""
