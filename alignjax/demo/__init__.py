"""Small preference pairs, written for this library, that show DPO at work in minutes on a CPU."""
