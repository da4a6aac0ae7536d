"""Every serving decision: what a step computes, who waits, who gives way, where requests go."""
