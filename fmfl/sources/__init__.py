"""Sources of images: files in the layouts that people have them in, and synthetic images: chest X-rays, kidneys."""
