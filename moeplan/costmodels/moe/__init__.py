"""Published schedules of one MoE layer in closed form, one family a file."""
