"""Where clients train: the options of every fleet, and the fleet that trains all clients in this process."""
