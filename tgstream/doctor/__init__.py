"""The doctor: checks whether the streams of an application reach its clients."""
