"""Tables and pages about finished runs, made from run directories alone."""
