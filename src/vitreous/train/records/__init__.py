"""What a run writes: its folder, metrics, predictions, summary, alarms."""
