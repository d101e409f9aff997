"""The version, in its one place: the build reads it here too."""

VERSION = "0.2.0"
