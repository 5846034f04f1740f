from agent_tools.mle_agent.cli import main

if __name__ == "__main__":
    main()
