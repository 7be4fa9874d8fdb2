"""Pipeline schedules: what every pipeline rank does in which order, and what that costs."""
