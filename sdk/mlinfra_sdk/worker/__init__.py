"""What runs on the machine: the agent, which outlives its clients, and the kernels it hosts."""
