"""A rule carried out around an optimizer: the averager and what it is made of."""
