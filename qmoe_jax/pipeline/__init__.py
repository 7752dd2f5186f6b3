"""The pipeline: the block loop that turns a native checkpoint into a compressed one."""
