"""The methods that come with backdoorscan, one module per published method or family."""
