"""What may stand in a job file or a serve config: every key, default, unit and rule."""
