"""What a run leaves behind: checkpoints, journal, MLflow."""
