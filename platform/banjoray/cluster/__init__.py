"""The same verbs, somewhere else."""
