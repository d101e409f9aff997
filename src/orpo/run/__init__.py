"""What a run is: its keys and configuration, its folder, and the one door to its rows."""
