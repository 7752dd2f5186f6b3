"""Fine-tuning and recovery: what is trained, its loss, the loop, and what it writes."""
