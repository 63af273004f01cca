"""The same study on Flower, in one process and deployed."""
