"""Networks other than the plain U-Net: MedSegDiff's, and the classifiers of weak supervision."""
