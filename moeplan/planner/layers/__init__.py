"""Studies of one MoE layer: schedules beside each other over sizes, from measured or published lines."""
