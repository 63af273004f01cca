"""Sources of images: files in the layouts that people have them in, synthetic chest X-rays and kidneys."""
