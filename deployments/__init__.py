"""What runs the project on a machine: manifests, and helpers in Python."""
