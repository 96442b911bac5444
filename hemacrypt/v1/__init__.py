"""The wire contract; the code in here is generated from proto/ by the build."""
