"""`ingot bench --profile`: where the time of a step goes, op by op, against the least time the machine could take."""
