"""The bulk job: folders of photos to tables of features."""
