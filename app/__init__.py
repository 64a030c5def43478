"""The demo in a web page and its HTTP API, over one loaded model."""
