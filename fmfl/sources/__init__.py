"""Sources of images: files in the layouts that people have them in, and synthetic chest X-rays."""
