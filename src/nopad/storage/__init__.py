"""Objects in stores and on servers, by address: `s3://bucket/photos/a.jpg`."""
