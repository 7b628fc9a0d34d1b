"""Plans of contiguous ranges, and of groups that share one."""
