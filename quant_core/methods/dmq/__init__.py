"""DMQ: equivalent scaling of input channels, power-of-two channel steps."""
