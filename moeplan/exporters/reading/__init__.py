"""Reading what people run today: launch scripts, argument files and logs become model, workload and layout."""
