"""The schedules of an MoE layer beside what their papers published; writes docs/schedules.md."""
