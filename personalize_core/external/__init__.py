"""Images that other programs made: what a folder of them holds, by the layouts of the tools that write them."""
