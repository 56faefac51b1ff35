"""``lightning-woodfisher benchmark``: what the parts of a step cost on this machine."""
