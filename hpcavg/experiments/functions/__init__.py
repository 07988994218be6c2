"""What runs of experiments do: functions that `hpcavg.experiments.run.Run` names."""
