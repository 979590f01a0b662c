"""sartor"""
