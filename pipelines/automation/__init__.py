"""What runs by itself: sensors, schedules, and the runs that they ask for."""
