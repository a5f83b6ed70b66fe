"""Where clients train: the options of every fleet, and the fleet of this process."""
