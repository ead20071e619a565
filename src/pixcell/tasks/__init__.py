"""The verbs: one file and one public function each. The command line and notebooks call the same ones."""
