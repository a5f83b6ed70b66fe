"""What is shown of finished runs. Reads run directories only."""
